"""What the documentation site is made with: the README's figure, and notebooks as pages."""
