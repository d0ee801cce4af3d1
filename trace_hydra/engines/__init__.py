"""What generates answers: the model in this process, a library's batching, or a server."""
