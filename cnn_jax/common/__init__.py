"""Code that every other package uses: errors, files, images, caches."""
