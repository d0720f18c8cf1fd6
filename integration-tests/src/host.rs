//! What kind of host this is: which guests its KVM can run, if it has one.

use crate::suite::Skip;
use anyhow::{Result, bail};
use nix::errno::Errno;
use std::process::Command;
use std::{env, fmt, fs::File, io, path::Path};

/// The environment variable that overrides the detection: `hardware`, `software` or `none`.
pub const HOST: &str = "BULKHEAD_HOST";
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
    /// This host.
    ///
    /// # Errors
    /// When [`HOST`] names no kind.
    pub fn detect() -> Result<Self> {
        match env::var(HOST).as_deref() {
            Ok("hardware") => return Ok(Self::Hardware),
            Ok("software") => return Ok(Self::Software),
            Ok("none") => return Ok(Self::None),
            Ok(other) => bail!("{HOST}={other} is not hardware, software or none"),
            Err(_) => {}
        }
        Ok(match open("/dev/kvm") {
            Err(_) => Self::None,
            Ok(()) if Path::new("/sys/module/kvm_pvm").exists() => Self::Software,
            Ok(()) => Self::Hardware,
        })
    }

    /// Why stock kernels do not run on it directly, and what mends that, if anything does.
    #[must_use]
    pub fn lack(self) -> String {
        match self {
            Self::None => no_kvm(open("/dev/kvm")),
            kind => format!("this host's KVM ({kind}) runs no stock kernel"),
        }
    }

    /// Goes on only where guests run.
    ///
    /// # Errors
    /// [`Skip`] where there is no KVM.
    pub fn need_kvm() -> Result<Self> {
        match Self::detect()? {
            Self::None => bail!(Skip(Self::None.lack())),
            host => Ok(host),
        }
    }

    /// Goes on only where guests run and TAPs can be made.
    ///
    /// # Errors
    /// [`Skip`] elsewhere.
    pub fn need_tun() -> Result<()> {
        Self::need_kvm()?;
        if open("/dev/net/tun").is_err() {
            bail!(Skip("/dev/net/tun cannot be opened here".to_owned()));
        }
        Ok(())
    }

    /// Goes on only where passt is installed.
    ///
    /// # Errors
    /// [`Skip`] elsewhere.
    pub fn need_passt() -> Result<()> {
        match Command::new("passt").arg("--version").output() {
            Ok(_) => Ok(()),
            Err(error) => bail!(Skip(format!("passt: {error}"))),
        }
    }

    /// Goes on only where stock kernels run.
    ///
    /// # Errors
    /// [`Skip`] elsewhere.
    pub fn need_linux_kvm() -> Result<()> {
        match Self::detect()? {
            Self::Hardware => Ok(()),
            host => bail!(Skip(format!(
                "{}; stock kernels run in the nested runner",
                host.lack()
            ))),
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
            Self::Hardware if env::var_os(NESTED).is_some() => "nested",
            Self::Hardware => "hardware",
            Self::Software => "software",
            Self::None => "none",
        })
    }
}

fn open(device: &str) -> io::Result<()> {
    File::options().read(true).write(true).open(device).map(drop)
}

/// From how `/dev/kvm` opened.
fn no_kvm(opened: io::Result<()>) -> String {
    match opened {
        Ok(()) => format!("/dev/kvm is left alone ({HOST}=none)"),
        // Not EPERM: by a container's rules, which no group helps against.
        Err(error) if error.raw_os_error() == Some(Errno::EACCES as i32) => {
            "/dev/kvm is there, but not permitted to you: sudo usermod -aG kvm \"$USER\", then log in again"
                .to_owned()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
        Err(error) => format!("/dev/kvm: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_not_open_kvm_is_told_how_to_get_it() {
        let said = |errno: Errno| no_kvm(Err(errno.into()));
        assert!(
            said(Errno::EACCES).contains("usermod -aG kvm"),
            "{}",
            said(Errno::EACCES)
        );
        assert!(
            said(Errno::EPERM).contains("not permitted"),
            "{}",
            said(Errno::EPERM)
        );
        assert_eq!(said(Errno::ENOENT), "there is no /dev/kvm");
        assert!(
            said(Errno::ENODEV).contains("No such device"),
            "{}",
            said(Errno::ENODEV)
        );
        assert!(no_kvm(Ok(())).contains("BULKHEAD_HOST=none"));
    }
}
