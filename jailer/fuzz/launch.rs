//! The fronts of files that the launcher looks at itself: an image's, which its guest may have written, and
//! a kernel's.

use super::{kernel, qcow2};

/// Reads the input as both. What lies behind an image has a name that is in the input.
pub fn files(input: &[u8]) {
    let wants = qcow2::wants(&input[..input.len().min(qcow2::FRONT)]);
    if let Some(backing) = wants.ok().and_then(|wants| wants.backing) {
        let name = backing.name.as_bytes();
        assert!(!name.is_empty() && name.len() <= 1023);
        assert!(input.windows(name.len()).any(|part| part == name));
    }
    let read_at = |offset: u64, most: usize| {
        assert!(most <= 1 << 20, "{most} bytes at once");
        let at = usize::try_from(offset).map_or(input.len(), |at| at.min(input.len()));
        input[at..].iter().take(most).copied().collect()
    };
    let front = &input[..input.len().min(kernel::FRONT)];
    let _ = kernel::identify(front, input.len() as u64, &read_at);
}
