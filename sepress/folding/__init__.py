"""Gates that hardly matter -> constants in the weights around them, their SE blocks gone (`sepress.fold`)."""
