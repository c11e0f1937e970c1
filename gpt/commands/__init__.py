"""One file per verb of the command line: `run(argv) -> exit status`."""
