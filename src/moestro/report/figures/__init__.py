"""One function per picture: each returns a `draw.Picture` (inline SVG, caption, data table), or None without data."""
