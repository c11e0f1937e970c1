"""Where a run starts, and what may change when it resumes."""
