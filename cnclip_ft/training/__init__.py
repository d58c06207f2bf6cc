"""From a recipe to checkpoints: what trains, for how long, on which objective, and how it goes on."""
