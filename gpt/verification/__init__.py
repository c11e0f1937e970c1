"""A run that is killed and continued, beside the same run left in peace."""
