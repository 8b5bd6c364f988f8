"""What has no opinion: errors, validation, JSON, files, units."""
