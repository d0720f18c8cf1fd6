//! KVM_CREATE_VM and the memory slots.

#![expect(
    unsafe_code,
    reason = "hands guest RAM mappings to KVM; adopts the inherited /dev/kvm"
)]

use super::irqchip::Irqchip;
use super::pmu::Pmu;
use super::{cpuid, vcpu::Vcpu};
use crate::error::Error;
use crate::memory::GuestRam;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Where KVM keeps three pages of its own on Intel hosts: above the I/O APIC, below the flash
/// area, in no window of ours.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// A virtual machine with its memory and its interrupt controllers.
pub struct Vm {
    fd: Arc<VmFd>,
    // The slots point into this mapping: it must outlive the VM.
    ram: Arc<GuestRam>,
    cpuid: Mutex<Cpuid>,
    cpus: u8,
}

/// The CPUID that all vCPUs share. Where the host is virtual itself, each leaf that KVM looks up is
/// an exit to its own host: that takes as long as all else, and goes on beside it.
enum Cpuid {
    Coming(JoinHandle<Result<CpuId, Error>>),
    Known(CpuId),
    Failed,
}

/// `/dev/kvm`, which is being asked for its CPUID.
pub struct Host {
    kvm: Arc<Kvm>,
    cpuid: Cpuid,
    cpus: u8,
}

impl Host {
    /// Begins to ask what the `cpus` vCPUs of a VM will need to know.
    ///
    /// # Errors
    /// [`Error::Config`] for a descriptor that is not KVM's, [`Error::System`] when no thread can be made.
    pub fn new(kvm: OwnedFd, cpus: u8) -> Result<Self, Error> {
        // SAFETY: the descriptor is ours (OwnedFd) and ownership moves into `Kvm`. Should it not
        // be /dev/kvm, the ioctls below fail with ENOTTY.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(Error::Config(format!(
                "the descriptor given as /dev/kvm answers API version {version}, not {KVM_API_VERSION}"
            )));
        }
        let kvm = Arc::new(kvm);
        let cpuid = Cpuid::ask(kvm.clone(), cpus)?;
        Ok(Self { kvm, cpuid, cpus })
    }
}

impl Vm {
    /// Makes the VM: slots first, then the irqchip (the other order costs several milliseconds).
    /// `/dev/kvm` is closed once there is a vCPU.
    ///
    /// # Errors
    /// [`Error::Kvm`] naming the step, [`Error::Config`] for a KVM that lacks what is needed.
    pub fn new(host: Host, ram: Arc<GuestRam>, irqchip: &dyn Irqchip) -> Result<Self, Error> {
        let Host { kvm, cpuid, cpus } = host;
        let fd = kvm.create_vm().map_err(Error::kvm("create the VM"))?;
        set_slots(&fd, &ram)?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(Error::kvm("place the task state segment"))?;
        irqchip.create(&fd)?;
        Ok(Self {
            fd: Arc::new(fd),
            ram,
            cpuid: Mutex::new(cpuid),
            cpus,
        })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        self.cpus
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    pub(super) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Makes vCPU `index` with its CPUID, MSRs and local APIC. To be called on the thread that
    /// will run it.
    ///
    /// # Errors
    /// [`Error::Kvm`] naming the step.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, Error> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(Error::kvm("create a vCPU"))?;
        let mut cpuid = self.cpuid.lock().unwrap_or_else(PoisonError::into_inner).wait()?;
        cpuid::for_vcpu(&mut cpuid, index);
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a vCPU's CPUID"))?;
        Vcpu::new(fd, index, Pmu::new(&cpuid))
    }
}

impl Cpuid {
    /// The thread that asks is joined before the first vCPU's is confined.
    fn ask(kvm: Arc<Kvm>, cpus: u8) -> Result<Self, Error> {
        thread::Builder::new()
            .name("cpuid".to_owned())
            .spawn(move || {
                let mut cpuid = kvm
                    .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                    .map_err(Error::kvm("read the supported CPUID"))?;
                let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
                cpuid::for_guest(&mut cpuid, cpus, deadline_timer)?;
                Ok(cpuid)
            })
            .map(Self::Coming)
            .map_err(Error::system("start the thread that asks for CPUID"))
    }

    fn wait(&mut self) -> Result<CpuId, Error> {
        let known = match std::mem::replace(self, Self::Failed) {
            Self::Coming(asking) => asking.join().unwrap_or_else(|_| Err(Self::unknown()))?,
            Self::Known(cpuid) => cpuid,
            Self::Failed => return Err(Self::unknown()),
        };
        *self = Self::Known(known.clone());
        Ok(known)
    }

    fn unknown() -> Error {
        Error::Config("the host's CPUID is not known".into())
    }
}

fn set_slots(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (slot, region) in (0..).zip(ram.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.guest_address,
            memory_size: region.size,
            userspace_addr: region.host_address,
        };
        // SAFETY: the region is a mapping of guest RAM, used by nothing but guest memory accesses
        // and kept mapped by the `Arc<GuestRam>` that lives as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("give the VM its memory"))?;
    }
    Ok(())
}
