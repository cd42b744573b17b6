// The bundle's model through ExecuTorch, written from manifest.json. Not compiled where it was written.
// Gradle: implementation("org.pytorch:executorch-android:{{version}}"), the version that the self-test passed with. Put the folder
// model/ into src/main/assets.
import android.content.Context
import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class Model(context: Context) : AutoCloseable {
    private val module = Module.load(copied(context).path)

    /** One output for one row of token ids; inputs have no names there but an order. */
    fun run(ids: Map<String, LongArray>, output: String): FloatArray = run(
        INPUTS.map { ids.getValue(it) }.map { EValue.from(Tensor.fromBlob(it, longArrayOf(1, it.size.toLong()))) },
        output,
    )

    /** One output for one row of floats. */
    fun run(input: String, values: FloatArray, shape: LongArray, output: String): FloatArray =
        run(listOf(EValue.from(Tensor.fromBlob(values, shape))), output)

    private fun run(feed: List<EValue>, output: String): FloatArray =
        module.forward(*feed.toTypedArray())[OUTPUTS.indexOf(output)].toTensor().dataAsFloatArray

    /** ExecuTorch opens files only, and an asset is none. */
    private fun copied(context: Context): File {
        val file = File(context.noBackupFilesDir, "model.pte")
        context.assets.open("{{model}}").use { from -> file.outputStream().use { from.copyTo(it) } }
        return file
    }

    override fun close() = module.destroy()

    private companion object {
        val INPUTS = listOf({{inputs}})
        val OUTPUTS = listOf({{outputs}})
    }
}
