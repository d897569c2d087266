"""Looking at models and at differences between them, without ever changing them."""
