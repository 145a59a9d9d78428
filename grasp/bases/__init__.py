"""What a fine-tune is kept off, and how it is found."""
