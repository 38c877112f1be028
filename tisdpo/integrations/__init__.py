"""The loss inside other people's trainers."""
