"""The whole job in two minutes, on images and a small pre-trained model that ship with the package."""
