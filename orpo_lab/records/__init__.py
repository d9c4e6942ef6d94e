"""What a run leaves on the disk: its folder, its results, its pictures."""
