"""Custom ops: attention, the fused loss, recomputation, and the C kernel; README.md says how they work together."""
