"""Other machines, reached over SSH, on which artifacts are timed by the same harness as here."""
