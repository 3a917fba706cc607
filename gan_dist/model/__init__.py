"""The two players and what they play for."""
