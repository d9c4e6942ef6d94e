"""Many runs: a folder of run folders, in which every effective configuration runs once."""
