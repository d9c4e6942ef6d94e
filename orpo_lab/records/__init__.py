"""What a run writes to the disk: its folder, its results, its pictures."""
