"""The look of the page: two themes, one column, tables that scroll, nothing fetched from anywhere."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --panel: #f5f5f2; --ink: #1c1e21; --muted: #5f6670; --grid: #dcdcd6; --accent: #0b6aa8;
  --warn: #8a4b00; --warn-paper: #fdf3e3;
  --s0: #0072b2; --s1: #d55e00; --s2: #00815e; --s3: #b8568d; --s4: #b07a00; --s5: #3d9bd4; --s6: #6b6b6b;
  --d0: #471365; --d1: #46337f; --d2: #3c508b; --d3: #30698e; --d4: #26818e;
  --d5: #1f988b; --d6: #28ae80; --d7: #50c46a; --d8: #86d549;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --panel: #1e2125; --ink: #e8e8e5; --muted: #a0a6ae; --grid: #363a40; --accent: #6cb8ee;
    --warn: #f2c079; --warn-paper: #33291a;
    --s0: #56b4e9; --s1: #f3894a; --s2: #35c795; --s3: #e39ac4; --s4: #edb33b; --s5: #9ad4f7; --s6: #a9a9a9;
    --d0: #2e6f8e; --d1: #26828e; --d2: #1f958b; --d3: #22a884; --d4: #3bbb75;
    --d5: #63cb5f; --d6: #95d840; --d7: #cae11f; --d8: #fde725;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
header { border-bottom: 1px solid var(--grid); padding-bottom: 1.5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.4rem; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 3.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
p { max-width: 44rem; margin: 0.5rem 0; }
.lead { color: var(--muted); font-size: 1.05rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin-top: 1rem; font-size: 0.9rem; }
nav a { color: var(--accent); text-decoration: none; white-space: nowrap; }
nav a:hover, nav a:focus { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; margin: 1.75rem 0; }
.tile { background: var(--panel); border-radius: 10px; padding: 0.9rem 1.1rem; }
.tile .label { color: var(--muted); font-size: 0.82rem; }
.tile .value { font-size: 1.6rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.tile .note { color: var(--muted); font-size: 0.82rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0.5rem 1.5rem; }
figure { margin: 1.25rem 0 1.75rem; min-width: 0; }
figure h3 { margin: 0 0 0.4rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide { overflow-x: auto; }
.wide svg { min-width: 40rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: 0.87rem; margin-top: 0.5rem; max-width: 46rem; }
details { margin-top: 0.5rem; font-size: 0.87rem; }
summary { color: var(--accent); cursor: pointer; width: fit-content; }
.scroll { overflow: auto; max-height: 26rem; margin-top: 0.5rem; border: 1px solid var(--grid); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.3rem 0.75rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 0.85rem; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.scroll thead th { position: sticky; top: 0; background: var(--panel); }
.compare { margin: 1rem 0 0.5rem; }
.compare td { padding: 0.5rem 0.75rem; }
.compare .unit, .muted { color: var(--muted); font-size: 0.85rem; }
.compare .best { font-weight: 650; }
.compare .best::after { content: " \\2190"; color: var(--accent); }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: 0.87rem; }
.settings td:first-child { color: var(--muted); white-space: nowrap; width: 16rem; }
.tokens td { text-align: left; white-space: normal; }
.tokens td:first-child { white-space: nowrap; width: 5.5rem; color: var(--muted); }
code, pre { font: 0.87rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.chip {
  display: inline-block; background: var(--panel); border-radius: 5px; padding: 0.05rem 0.45rem; margin: 0.12rem 0.2rem;
  white-space: pre;
}
.chip bdi { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.87rem; }
.chip small { color: var(--muted); margin-left: 0.4rem; font-size: 0.72rem; }
pre {
  background: var(--panel); border-radius: 10px; padding: 1rem 1.2rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0.5rem 0 1rem;
}
pre .prompt { color: var(--accent); font-weight: 600; }
.warn { background: var(--warn-paper); color: var(--warn); border-radius: 10px; padding: 0.8rem 1.1rem; }
.warn p { max-width: none; margin: 0.15rem 0; }
footer { margin-top: 4rem; border-top: 1px solid var(--grid); padding-top: 1rem; }
footer p { color: var(--muted); font-size: 0.85rem; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.6rem; } }
@media print { details { display: none; } body { max-width: none; } figure, .tile { break-inside: avoid; } }
"""
