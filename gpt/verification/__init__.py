"""Kill and resume a run again and again, and compare it bit by bit with a reference run that nothing interrupted."""
