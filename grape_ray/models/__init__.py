"""Models and tasks made from Hugging Face's libraries."""
