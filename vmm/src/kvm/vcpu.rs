//! A vCPU, and how another thread gets it out of the guest.

#![expect(
    unsafe_code,
    reason = "signals a thread and writes KVM_RUN's immediate_exit byte"
)]

use super::msrs;
use super::pmu::Pmu;
use super::registers::{self, Entry};
use crate::error::Error;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, kvm_mp_state,
    kvm_regs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One virtual processor; lives on the thread that made it.
pub struct Vcpu {
    // Dropped first: after it no kick touches the kvm_run mapping.
    kicker: Arc<Kicker>,
    fd: VcpuFd,
    index: u8,
    pmu: Pmu,
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, index: u8, pmu: Pmu) -> Result<Self, Error> {
        msrs::initialise(&fd, &pmu)?;
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        let target = Target {
            // SAFETY: pthread_self has no preconditions.
            thread: unsafe { libc::pthread_self() },
            immediate_exit: flag.cast(),
        };
        let kicker = Arc::new(Kicker(Mutex::new(Some(target))));
        Ok(Self {
            kicker,
            fd,
            index,
            pmu,
        })
    }

    /// The handle that gets this vCPU out of the guest.
    #[must_use]
    pub fn kicker(&self) -> Arc<Kicker> {
        self.kicker.clone()
    }

    /// Sets the boot CPU's registers to enter a kernel.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn enter_at(&self, entry: &Entry) -> Result<(), Error> {
        self.fd
            .set_sregs(&entry.sregs())
            .map_err(Error::kvm("set the boot CPU's segment registers"))?;
        self.fd
            .set_regs(&entry.regs())
            .map_err(Error::kvm("set the boot CPU's registers"))
    }

    /// Brings the vCPU to its power-on state: vCPU 0 runnable, the others waiting for INIT.
    ///
    /// # Errors
    /// [`Error::Kvm`] naming the step.
    pub fn reset(&self) -> Result<(), Error> {
        let kvm = Error::kvm;
        let fd = &self.fd;
        fd.set_sregs(&registers::power_on_sregs())
            .map_err(kvm("reset a vCPU's segment registers"))?;
        fd.set_regs(&kvm_regs {
            rflags: 2,
            rip: 0xFFF0,
            ..Default::default()
        })
        .map_err(kvm("reset a vCPU's registers"))?;
        fd.set_fpu(&registers::power_on_fpu())
            .map_err(kvm("reset a vCPU's floating point unit"))?;
        reset_xcr0(fd);
        fd.set_debug_regs(&registers::power_on_debug())
            .map_err(kvm("reset a vCPU's debug registers"))?;
        msrs::reset(fd, &self.pmu)?;
        let mut lapic = fd.get_lapic().map_err(kvm("read a local APIC"))?;
        registers::power_on_lapic(&mut lapic.regs, self.index);
        fd.set_lapic(&lapic).map_err(kvm("reset a local APIC"))?;
        fd.set_vcpu_events(&kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING
                | KVM_VCPUEVENT_VALID_SHADOW
                | KVM_VCPUEVENT_VALID_SIPI_VECTOR
                | KVM_VCPUEVENT_VALID_SMM,
            ..Default::default()
        })
        .map_err(kvm("clear a vCPU's pending events"))?;
        let mp_state = match self.index {
            0 => KVM_MP_STATE_RUNNABLE,
            _ => KVM_MP_STATE_UNINITIALIZED,
        };
        fd.set_mp_state(kvm_mp_state { mp_state })
            .map_err(kvm("reset a vCPU's run state"))
    }

    /// Runs the guest until it needs user space or is kicked.
    ///
    /// # Errors
    /// EINTR and EAGAIN when kicked; anything else is KVM's failure.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run()
    }

    /// Forgets a kick, so that the next [`Vcpu::run`] enters the guest. To be called before
    /// looking at what the kick was for.
    pub fn acknowledge_kick(&mut self) {
        self.kicker.set_immediate_exit(0);
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        *self.kicker.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// XCR0 back to x87 only. A KVM without XSAVE has nothing to reset.
fn reset_xcr0(fd: &VcpuFd) {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        value: 1,
        ..Default::default()
    };
    if let Err(error) = fd.set_xcrs(&xcrs) {
        tracing::debug!(%error, "XCR0 not reset");
    }
}

struct Target {
    thread: libc::pthread_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: `thread` may be signalled from any thread, and `immediate_exit` is only written to,
// atomically, while the lock around the target shows that the vCPU still exists.
unsafe impl Send for Target {}

/// Gets one vCPU out of the guest, from any thread.
pub struct Kicker(Mutex<Option<Target>>);

impl Kicker {
    /// Makes the vCPU leave the guest, or not enter it the next time. Does nothing once the vCPU
    /// is gone.
    pub fn kick(&self) {
        self.set_immediate_exit(1);
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = target.as_ref() {
            // SAFETY: the thread owns the vCPU, which exists, so the thread exists too.
            unsafe { libc::pthread_kill(target.thread, libc::SIGRTMIN()) };
        }
    }

    fn set_immediate_exit(&self, value: u8) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = target.as_ref() {
            // SAFETY: the vCPU clears the target before it unmaps kvm_run, under this lock.
            unsafe { &*target.immediate_exit }.store(value, Ordering::SeqCst);
        }
    }
}

extern "C" fn ignore_signal(_: libc::c_int) {}

/// Installs the handler of the kick signal: an empty one, so that the signal interrupts KVM_RUN
/// and nothing else. Once per process, before the first vCPU.
///
/// # Errors
/// [`Error::System`].
pub fn install_kick_handler() -> Result<(), Error> {
    // SAFETY: an all-zero sigaction is valid: no flags (no SA_RESTART), empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore_signal as *const () as usize;
    // SAFETY: the action is initialised and its handler does nothing, so it is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::system("install the kick signal's handler")(
            std::io::Error::last_os_error(),
        ))
    }
}
