"""What a model will cost on a chip, from its configuration: no weights, no hardware, no kernel built."""
