"""What a running cluster tells of itself: the API's answers, what the ranks do, memory, how far a load has come."""
