"""What a plan means: transition, verification, bounds."""
