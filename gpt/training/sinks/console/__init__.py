"""The console of a run: its plan, a live bar, lines for what happens, and a closing summary."""
