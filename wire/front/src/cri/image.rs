//! `runtime.v1.ImageService`.

use super::{Cri, feed, info, lists, required};
use kernel::Fault;
use messages::image::{FsInfo, Images, Pull, Remove};
use proto::async_trait;
use proto::cri::image_service_server::ImageService;
use proto::cri::*;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// Annotation of a pod that names its runtime handler.
const HANDLER: &str = "io.containerd.cri.runtime-handler";

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl ImageService for Cri {
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        self.call(
            "runtime.v1.ImageService/ListImages",
            request,
            |_, q| async move { Ok(ListImagesResponse { images: self.list(q.filter)? }) },
        )
        .await
    }

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let view = &self.images;
        self.call("runtime.v1.ImageService/ImageStatus", request, |_, q| async move {
            let found = view.find(&reference(q.image)?)?;
            let info = found.as_ref().filter(|_| q.verbose).map(|i| info::image(i)).unwrap_or_default();
            Ok(ImageStatusResponse { image: found.map(|i| lists::image(&i)), info })
        })
        .await
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let actor = self.system.addr::<Images>();
        self.call("runtime.v1.ImageService/PullImage", request, |cx, q| async move {
            let mut annotations = q.image.as_ref().map(|i| i.annotations.clone()).unwrap_or_default();
            let sandbox = q.sandbox_config.unwrap_or_default();
            // The annotation is how kubelets said it before the field existed.
            let named = q.image.as_ref().map(|i| i.runtime_handler.clone()).filter(|h| !h.is_empty());
            let handler = named.or_else(|| sandbox.annotations.get(HANDLER).cloned()).unwrap_or_default();
            annotations.extend(sandbox.labels);
            let reference = reference(q.image)?;
            cx.attr("container.image.name", &reference);
            let pull = Pull { reference, auth: q.auth, handler, annotations: annotations.into_iter().collect() };
            let (began, _under_way) = (std::time::Instant::now(), self.pulls.begin());
            let image = actor.call(&cx, pull).await?;
            self.pulls.ended(image.size, began.elapsed());
            Ok(PullImageResponse { image_ref: image.id.clone() })
        })
        .await
    }

    async fn remove_image(&self, request: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        let actor = self.system.addr::<Images>();
        self.call("runtime.v1.ImageService/RemoveImage", request, |cx, q| async move {
            let reference = reference(q.image)?;
            cx.attr("container.image.name", &reference);
            actor.call(&cx, Remove { reference }).await?;
            Ok(RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(&self, request: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        let actor = self.system.addr::<Images>();
        self.call("runtime.v1.ImageService/ImageFsInfo", request, |cx, _| async move { actor.call(&cx, FsInfo).await }).await
    }

    async fn stream_images(&self, request: Request<StreamImagesRequest>) -> Answer<BoxStream<StreamImagesResponse>> {
        self.call("runtime.v1.ImageService/StreamImages", request, |_, q| async move {
            Ok(feed::parts(self.list(q.filter)?, |images| StreamImagesResponse { images }))
        })
        .await
    }
}

impl Cri {
    fn list(&self, filter: Option<ImageFilter>) -> Result<Vec<Image>, Fault> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty());
        match wanted {
            Some(reference) => Ok(self.images.find(&reference)?.iter().map(|i| lists::image(i)).collect()),
            None => Ok(self.images.0.load().iter().map(|i| lists::image(i)).collect()),
        }
    }
}

fn reference(image: Option<ImageSpec>) -> Result<String, Fault> {
    let image = required(image, "image")?;
    if image.image.is_empty() { Err(Fault::invalid_argument("image.image is empty")) } else { Ok(image.image) }
}
