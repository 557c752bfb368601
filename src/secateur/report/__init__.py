"""What a run did and what it cost, as data and on the terminal."""
