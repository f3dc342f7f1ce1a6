"""What several families share: attention, experts, routers and rotary positions in their files and fields."""
