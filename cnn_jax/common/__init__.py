"""What every other part uses: errors, files, images, caches."""
