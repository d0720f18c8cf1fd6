//! A request queue whose driver is the fuzzer.

use super::file::MemoryFile;
use crate::image::{Image, RawImage};
use crate::queue::BlkQueue;
use crate::settings::{OnError, Settings};
use std::sync::{Arc, OnceLock};
use vhost_daemon::bucket::SharedLimiter;

const CAPACITY: usize = 64 << 10;

/// Requests of any framing and content, with the feature bits of the input's first byte.
pub fn queue(input: &[u8]) {
    // Queues share an image that is never freed.
    static DISK: OnceLock<(Arc<MemoryFile>, RawImage)> = OnceLock::new();
    let (file, image) = DISK.get_or_init(|| {
        let file = Arc::new(MemoryFile::new(vec![0; CAPACITY]));
        let image = RawImage::on(file.clone(), false).expect("a raw image");
        (file, image)
    });
    let Some((features, input)) = input.split_first() else {
        return;
    };
    file.lock().fill(7);
    // FLUSH, DISCARD, WRITE_ZEROES.
    let features = u64::from(features & 1) << 9 | u64::from(features >> 1 & 3) << 13;
    let settings = Settings {
        serial: Arc::from(&b"serial"[..]),
        limits: SharedLimiter::default(),
        on_error: OnError::Report,
        trouble: Arc::default(),
    };
    let mut queue = BlkQueue::new(
        0,
        image as &'static dyn Image,
        settings,
        Arc::default(),
        None,
        None,
    );
    vhost_daemon::fuzz::serve(&mut queue, features, input);
    assert_eq!(file.lock().len(), CAPACITY, "a request changed the disk's size");
}
