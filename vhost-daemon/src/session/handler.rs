//! The meaning of each message (vhost-user, "Front-end message types").
//!
//! Two kinds of refusal: [`refuse`] answers "failed" and goes on, where the answer says all;
//! [`broken`] ends the session, where the front end waits for a reply that cannot be given.

use super::vring::Addresses;
use super::{Session, SessionError};
use crate::memory::{GuestMemory, RegionSpec};
use crate::ring::InflightRegion;
use std::fs::File;
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, *};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

/// Most bytes of configuration space (VHOST_USER_CONFIG_SIZE's bound in this crate's messages).
const MAX_CONFIG: usize = 256;

/// The front end is told that the message failed; the session goes on.
fn refuse(error: SessionError) -> Error {
    tracing::warn!(
        error = &error as &dyn std::error::Error,
        "vhost-user message refused"
    );
    Error::ReqHandlerError(std::io::Error::other(error))
}

/// The session ends.
fn broken(error: SessionError) -> Error {
    tracing::error!(
        error = &error as &dyn std::error::Error,
        "vhost-user message cannot be answered"
    );
    Error::BackendInternalError
}

impl Session {
    /// What the front end said about a ring, or all of them, is wrong. One that asked for no answer would take it for
    /// one that runs: the ring's error eventfd tells it, or, where it gave none and no answers were agreed on, the end
    /// of the session. That eventfd is with the ring's thread, which may be in a call.
    fn refuse_setup(&mut self, ring: Option<u32>, error: SessionError) -> Error {
        if let Some(Ok((worker, _))) = ring.map(|index| self.queue(index)) {
            let _ = worker.fault();
        }
        let vring = ring.and_then(|index| self.vrings.get(index as usize));
        let hears =
            self.protocol_negotiated(Protocol::REPLY_ACK) || vring.is_some_and(|vring| vring.has_error);
        if hears { refuse(error) } else { broken(error) }
    }

    fn set_ring_size(&mut self, index: u32, size: u32) -> std::result::Result<(), SessionError> {
        let most = u32::from(self.device.max_queue_size());
        let (_, vring) = self.queue(index)?;
        if !size.is_power_of_two() || size > most {
            return Err(SessionError::Value {
                what: "ring size",
                value: size.into(),
            });
        }
        vring.size = size as u16;
        Ok(())
    }

    fn set_ring_base(&mut self, index: u32, base: u32) -> std::result::Result<(), SessionError> {
        let (_, vring) = self.queue(index)?;
        vring.base = u16::try_from(base).map_err(|_| SessionError::Value {
            what: "ring base",
            value: base.into(),
        })?;
        Ok(())
    }

    fn kick_ring(&mut self, index: u32, kick: Option<File>) -> std::result::Result<(), SessionError> {
        let kick = kick.ok_or(SessionError::Order("a ring without a kick fd is not offered"))?;
        let (worker, vring) = self.queue(index)?;
        if vring.running {
            return Ok(worker.set_kick(kick.into())?);
        }
        self.start_ring(index, kick.into())
    }
}

fn region_spec(guest: u64, size: u64, user: u64, offset: u64) -> RegionSpec {
    RegionSpec {
        guest_address: guest,
        size,
        user_address: user,
        offset,
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_rings().map_err(refuse)
    }

    fn reset_device(&mut self) -> Result<()> {
        Session::reset_device(self).map_err(refuse)
    }

    fn get_features(&mut self) -> Result<u64> {
        // Asked at the start, and by a front end that sees no progress.
        self.end_if_a_thread_spins();
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            let wrong = SessionError::Value {
                what: "feature set with bits never offered",
                value: unknown,
            };
            return Err(self.refuse_setup(None, wrong));
        }
        self.features = features;
        self.device.set_features(features);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.offered_protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered_protocol_features().bits();
        if unknown != 0 {
            return Err(refuse(SessionError::Value {
                what: "protocol feature set with bits never offered",
                value: unknown,
            }));
        }
        if features & (Protocol::INFLIGHT_SHMFD | Protocol::GET_VRING_BASE_INFLIGHT).bits()
            == Protocol::GET_VRING_BASE_INFLIGHT.bits()
        {
            return Err(refuse(SessionError::Order(
                "VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT without VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD",
            )));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.workers.len() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut memory = GuestMemory::default();
        for (region, file) in regions.iter().zip(files) {
            let spec = region_spec(
                region.guest_phys_addr,
                region.memory_size,
                region.user_addr,
                region.mmap_offset,
            );
            let added = memory.with_region(spec, OwnedFd::from(file), self.sealing);
            memory = added.map_err(|error| refuse(error.into()))?;
        }
        self.replace_memory(memory).map_err(broken)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(crate::memory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let spec = region_spec(
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            region.mmap_offset,
        );
        let added = self.memory.with_region(spec, OwnedFd::from(file), self.sealing);
        let memory = added.map_err(|error| refuse(error.into()))?;
        self.replace_memory(memory).map_err(broken)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let left = self
            .memory
            .without_region(region.guest_phys_addr, region.user_addr, region.memory_size);
        let memory = left.map_err(|error| refuse(error.into()))?;
        self.replace_memory(memory).map_err(broken)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let done = self.set_ring_size(index, num);
        done.map_err(|error| self.refuse_setup(Some(index), error))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            descriptors: descriptor,
            available,
            used,
        };
        let done = match self.queue(index) {
            // Not offered.
            _ if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) => Err(SessionError::Order(
                "the ring was to be logged, which was not offered",
            )),
            Ok((_, vring)) => {
                vring.addresses = Some(addresses);
                Ok(())
            }
            Err(error) => Err(error),
        };
        done.map_err(|error| self.refuse_setup(Some(index), error))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let done = self.set_ring_base(index, base);
        done.map_err(|error| self.refuse_setup(Some(index), error))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let leaves = self.protocol_negotiated(Protocol::GET_VRING_BASE_INFLIGHT);
        let (worker, vring) = self.queue(index).map_err(broken)?;
        let stopped = if leaves { worker.leave() } else { worker.stop() };
        if let Some(state) = stopped.map_err(|error| broken(error.into()))? {
            vring.base = state.base;
        }
        vring.running = false;
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let done = self.kick_ring(index, fd);
        done.map_err(|error| self.refuse_setup(Some(index), error))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (worker, _) = self.queue(index.into()).map_err(refuse)?;
        worker
            .set_call(fd.map(Into::into))
            .map_err(|error| broken(error.into()))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (worker, vring) = self.queue(index.into()).map_err(refuse)?;
        vring.has_error = fd.is_some();
        worker
            .set_error(fd.map(Into::into))
            .map_err(|error| broken(error.into()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable_vring(index, enable.into()).map_err(refuse)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (offset, size) = (offset as usize, size as usize);
        if offset.saturating_add(size) > MAX_CONFIG {
            return Err(Error::InvalidParam);
        }
        // A front end may know fields that this device does not have: they read as 0.
        let mut config = self.device.config();
        config.resize(MAX_CONFIG, 0);
        Ok(config
            .get(offset..offset + size)
            .map(<[u8]>::to_vec)
            .unwrap_or_default())
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let end = (offset as usize).saturating_add(buf.len());
        let inside = end <= self.device.config().len();
        if inside && self.device.write_config(offset, buf).is_ok() {
            return Ok(());
        }
        // A guest can cause this as often as it likes.
        tracing::debug!(
            offset,
            length = buf.len(),
            "write to a read-only configuration field"
        );
        Err(Error::ReqHandlerError(
            std::io::ErrorKind::PermissionDenied.into(),
        ))
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // Taken by `direct`, which keeps the socket itself.
    }

    fn get_inflight_fd(&mut self, _wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("handled before the crate sees it"))
    }

    fn set_inflight_fd(&mut self, _kept: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("handled before the crate sees it"))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU device"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state is not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device state is not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions are not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not offered"))
    }
}

/// An in-flight region as a message describes it ("Inflight description").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct InflightDescription {
    /// Bytes mapped.
    pub(super) size: u64,
    /// Where it starts in the file.
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

impl Session {
    fn check_inflight_time(&self) -> std::result::Result<(), SessionError> {
        if !self.protocol_negotiated(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Err(SessionError::Order(
                "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD was not negotiated",
            ));
        }
        if self.vrings.iter().any(|vring| vring.running) {
            return Err(SessionError::Order("an in-flight region while rings run"));
        }
        Ok(())
    }

    /// GET_INFLIGHT_FD: our region, emptied, in the shape that the front end wants.
    pub(super) fn new_inflight(
        &mut self,
        wanted: &InflightDescription,
    ) -> std::result::Result<(InflightDescription, OwnedFd), SessionError> {
        self.check_inflight_time()?;
        let own = self.own_inflight.as_ref();
        let (own, fd) = own.ok_or(SessionError::Order("in-flight I/O is not recorded"))?;
        let shape = |what, value: u16| SessionError::Value {
            what,
            value: value.into(),
        };
        if wanted.queues == 0 || wanted.queues > own.queues() {
            return Err(shape("number of queues", wanted.queues));
        }
        if wanted.queue_size == 0 || wanted.queue_size > own.queue_size() {
            return Err(shape("ring size", wanted.queue_size));
        }
        let fd = fd.try_clone().map_err(SessionError::Inflight)?;
        let region = own.shaped(wanted.queues, wanted.queue_size);
        region.zero();
        let answer = InflightDescription {
            size: region.size() as u64,
            offset: 0,
            ..*wanted
        };
        self.inflight = Some(region);
        Ok((answer, fd))
    }

    /// SET_INFLIGHT_FD: the region that the front end kept.
    pub(super) fn adopt_inflight(
        &mut self,
        kept: &InflightDescription,
        fd: &OwnedFd,
    ) -> std::result::Result<(), SessionError> {
        self.check_inflight_time()?;
        let region = InflightRegion::adopt(fd, kept.offset, kept.size, kept.queues, kept.queue_size);
        self.inflight = Some(region.map_err(SessionError::Inflight)?);
        Ok(())
    }
}
