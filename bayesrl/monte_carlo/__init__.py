"""The posterior by weighted and by accepted draws, and the bounds of rewards that they rest on."""
