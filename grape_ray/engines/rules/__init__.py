"""What is done with operations on parameters whose per-example gradient has a closed form."""
