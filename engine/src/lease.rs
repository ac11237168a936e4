//! Leases: images that stay in the store while somebody uses them.
//!
//! A lease is given only for an image that a listed snapshot has or that is
//! leased already, so it is whole at that moment; from then on a collection
//! counts everything that it reaches as needed. Leases live in memory: their
//! owners, sessions and machines, end with the process that owns the store.

use std::sync::Arc;

use crate::catalog::Catalog;
use crate::depot::Depot;
use crate::error::StoreError;
use crate::tree::ImageRef;

/// Keeps images from being collected until it is dropped.
#[derive(Debug)]
pub struct Lease {
    depot: Arc<Depot>,
    images: Vec<ImageRef>,
}

impl Lease {
    pub(crate) fn take(
        depot: &Arc<Depot>,
        catalog: &Catalog,
        images: &[ImageRef],
    ) -> Result<Self, StoreError> {
        depot.pins().lease(images, |image| catalog.lists(image)).map_err(|lost| {
            StoreError::Missing { what: "image of a listed snapshot", id: lost.root.to_string() }
        })?;
        Ok(Self { depot: Arc::clone(depot), images: images.to_vec() })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.depot.pins().release(&self.images);
    }
}
