//! Metadata images.
