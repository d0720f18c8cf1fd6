//! What kind of host this is: which guests its KVM can run, if it has one.

use std::fmt;
use std::path::Path;

/// The environment variable that overrides the detection: `hardware`, `software` or `none`.
pub const OVERRIDE: &str = "BULKHEAD_HOST";
/// Set in commands that run inside the nested runner.
pub const NESTED: &str = "BULKHEAD_NESTED";

/// What `/dev/kvm` runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// VMX or SVM, real or emulated: everything.
    Hardware,
    /// A paravirtual KVM in software: tiny guests, no stock kernel.
    Software,
    /// There is no `/dev/kvm` that this user may open.
    None,
}

impl Host {
    /// Looks at this host, or at [`OVERRIDE`].
    #[must_use]
    pub fn detect() -> Self {
        match std::env::var(OVERRIDE).as_deref() {
            Ok("hardware") => return Self::Hardware,
            Ok("software") => return Self::Software,
            Ok("none") => return Self::None,
            _ => {}
        }
        let usable = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        let has = |module| Path::new("/sys/module").join(module).exists();
        match usable {
            false => Self::None,
            true if has("kvm_pvm") => Self::Software,
            true if has("kvm_intel") || has("kvm_amd") => Self::Hardware,
            // An unknown vendor module: only the least may be expected of it.
            true => Self::Software,
        }
    }

    /// Stock kernels run on it directly.
    #[must_use]
    pub fn runs_linux(self) -> bool {
        self == Self::Hardware
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware if std::env::var_os(NESTED).is_some() => "nested",
            Self::Hardware => "hardware",
            Self::Software => "software",
            Self::None => "none",
        })
    }
}
