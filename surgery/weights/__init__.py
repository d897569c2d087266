"""The weight space: task vectors and what is done with them."""
