"""Where in a picture something is: heat maps and boxes for phrases."""
