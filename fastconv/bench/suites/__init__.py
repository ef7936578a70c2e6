"""What `fastconv bench` measures: cases, the trials made of them, and the runner."""
