"""Novel view synthesis: GNT, its shift-and-add forms, a NeRF baseline and floors that learn nothing."""
