"""The bundled donor and recipient, their prompts, and `build`, the code that makes them again."""
