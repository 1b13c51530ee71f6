"""What the consumer of an engine needs to start: command lines, a Triton model repository, a page for people."""
