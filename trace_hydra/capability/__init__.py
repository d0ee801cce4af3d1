"""What the model could do before, and what is left: general ability, instruction following, safety."""
