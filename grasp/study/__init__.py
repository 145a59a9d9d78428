"""Fine-tunes, their rivals, and what each did: with what the guard is measured."""
