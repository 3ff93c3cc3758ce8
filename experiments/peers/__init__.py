"""Programs that run other libraries, for comparison, in environments of their own."""
