"""What an adapter is: the IR, its kinds and the algebra."""
