//! Fuzz targets: what a guest's exits reach, and back ends that lie.

mod exits;
mod frontend;
mod msix;
mod virtio;

pub use exits::exits;
pub use frontend::frontend;
pub use msix::msix;
pub use virtio::virtio;
