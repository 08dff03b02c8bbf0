"""The warehouse: seven product-analytics tables behind /dwh; repeated POSTs are safe."""
