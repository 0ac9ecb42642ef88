"""Time: requests, scheduling, the step loop, the rank group, and text in and out."""
